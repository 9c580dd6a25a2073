"""Each new user gets an account, a mail and preferences; three users at a time, on any number of hosts."""

import nodes

from pocketfleet import ThrottledAsyncParallelBatchFlow

create, email, preferences = nodes.CreateAccount(), nodes.SendEmail(), nodes.SetPreferences()
create - "send_email" >> email
email - "set_preferences" >> preferences


class OnboardingFlow(ThrottledAsyncParallelBatchFlow):
    name = "onboarding"
    max_concurrent_flows = 3

    async def on_worker_start(self):
        nodes.open_client()

    async def on_worker_stop(self):
        await nodes.client.aclose()

    async def prep_async(self, shared):
        return shared["new_users"]

    async def post_async(self, shared, prep_res, results):
        return f"{results.count('onboarded')} of {len(results)} users onboarded"


flow = OnboardingFlow(start=create)
