"""What each service answers: made from the call alone, so that the same call gets the same answer."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

Body = dict[str, Any]

KEYWORD_LETTERS = 5
GLAD = frozenset(["fast", "friendly", "fresh", "great", "love", "lovely", "perfect", "quick", "tasty"])
SORRY = frozenset(["bland", "broken", "cold", "late", "never", "rude", "slow", "stale", "wrong"])


def analyze(key: str, body: Body) -> Body:
    """How long a text is, and the three long words it uses most."""
    words = words_of(body["content"])
    long_words = Counter(word for word in words if len(word) >= KEYWORD_LETTERS)
    return {"words": len(words), "keywords": [word for word, _ in long_words.most_common(3)]}


def summarize(key: str, body: Body) -> Body:
    """The sentence that holds most of the keywords; the first of equals."""
    sentences = re.split(r"(?<=[.!?])\s+", body["content"].strip())
    keywords = set(body["keywords"])
    return {"summary": max(sentences, key=lambda sentence: len(keywords & set(words_of(sentence))))}


def create(key: str, body: Body) -> Body:
    return {"account_id": f"acc-{number_of(key):08x}", "email": key}


def email(key: str, body: Body) -> Body:
    return {"sent": True, "message_id": f"msg-{number_of(key + body['template']):08x}"}


def part(key: str, body: Body) -> Body:
    return {"part": body["part"], "value": number_of(key + body["part"]) % 1000}


def answer_of(region: str) -> Callable[[str, Body], Body]:
    def answer(key: str, body: Body) -> Body:
        return {"region": region, "request_id": key, "answer": number_of(region + key) % 1000}

    return answer


def kept(key: str, body: Body) -> Body:
    """For steps that keep what they are given: asked twice, they keep it once."""
    return {"kept": key}


def chat(prompt: str, body: Body) -> Body:
    """A chat completion in OpenAI's form: one word, from what the prompt's own words say."""
    words = words_of(prompt)
    score = sum(word in GLAD for word in words) - sum(word in SORRY for word in words)
    text = "positive" if score > 0 else "negative" if score < 0 else "neutral"
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {
        "id": f"chatcmpl-{number_of(prompt):08x}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": len(words), "completion_tokens": 1, "total_tokens": len(words) + 1},
    }


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def number_of(text: str) -> int:
    return zlib.crc32(text.encode())


SERVICES: dict[str, dict[str, Callable[[str, Body], Body]]] = {
    "documents": {"analyze": analyze, "summarize": summarize, "store": kept},
    "onboarding": {"create": create, "email": email, "preferences": kept},
    "regions": {region: answer_of(region) for region in ("us", "eu", "asia")},
    "nested": {"part": part, "report": kept},
    "llm": {"chat": chat},
}
"""The steps of each pipeline, in the order in which a run takes them."""

LAST = {name: set(steps) if name == "regions" else {list(steps)[-1]} for name, steps in SERVICES.items()}
"""The steps after which a run is done: a request asks one region only."""
