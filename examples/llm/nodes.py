"""Ask a language model whether a review is positive, with OpenAI's own client."""

import logging
import os

import openai
from pocketflow import AsyncNode

ASK = "Answer with one word, positive, negative or neutral: how does the guest feel about the place?"

client: openai.AsyncOpenAI | None = None


def open_client():
    """The address and the key come from OPENAI_BASE_URL and OPENAI_API_KEY, which the client reads itself.

    Its own retries are off: they would wait in secret and hold a place, while the fleet knows better.
    """
    global client
    for name in ("httpx", "httpx2"):  # what the client sends with, by its version
        logging.getLogger(name).setLevel(logging.WARNING)
    client = openai.AsyncOpenAI(max_retries=0)


class Classify(AsyncNode):
    async def exec_async(self, prep_res):
        # A refusal leaves as openai.RateLimitError: the run waits as long as OpenAI says and comes again.
        return await client.chat.completions.create(
            model=os.environ.get("OPENAI_MODEL", "gpt-4o-mini"),
            messages=[
                {"role": "system", "content": ASK},
                {"role": "user", "content": self.params["text"]},
            ],
        )

    async def post_async(self, shared, prep_res, exec_res):
        # Tokens per review, and not one sum: a number that many runs add to would lose what they add.
        shared.setdefault("tokens", {})[self.params["review_id"]] = exec_res.usage.total_tokens
        word = exec_res.choices[0].message.content.strip().lower()
        shared.setdefault("feelings", {})[self.params["review_id"]] = word
        return word
