"""Create the account, send the welcome mail, set the preferences."""

import logging
import os

import httpx
from pocketflow import AsyncNode

from pocketfleet import RateLimitHit

client: httpx.AsyncClient | None = None


def open_client():
    global client
    logging.getLogger("httpx").setLevel(logging.WARNING)
    client = httpx.AsyncClient(base_url=os.environ["SERVICES_URL"], timeout=30)


async def ask(step, email, body):
    answer = await client.post(f"/onboarding/{step}/{email}", json=body)
    return answer.raise_for_status().json()


class CreateAccount(AsyncNode):
    async def exec_async(self, prep_res):
        return await ask("create", self.params["email"], {"name": self.params["name"]})

    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("accounts", {})[self.params["email"]] = exec_res["account_id"]
        return "send_email"


class SendEmail(AsyncNode):
    async def exec_async(self, prep_res):
        answer = await ask("email", self.params["email"], {"template": "welcome"})
        if not answer["sent"]:
            # This service refuses with status 200 and a word of its own, so nobody but us can know. The
            # run goes back and comes again at this node: the account is not created twice.
            raise RateLimitHit(retry_after=answer["try_again_in_s"], source="mail service")
        return answer["message_id"]

    async def post_async(self, shared, prep_res, exec_res):
        shared.setdefault("mails", {})[self.params["email"]] = exec_res
        return "set_preferences"


class SetPreferences(AsyncNode):
    async def exec_async(self, prep_res):
        return await ask("preferences", self.params["email"], self.params["preferences"])

    async def post_async(self, shared, prep_res, exec_res):
        return "onboarded"
