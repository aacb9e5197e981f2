"""Rewards, one file each. `REWARDS` maps a name to its builder; a user's own is `package.module:attribute`.

A builder takes options (a model folder, a device) and returns an object with the attributes and the call of
`alignkit.protocols.Reward`. `gold` lives in the sandbox and comes in through the same table.
"""

REWARDS = {
    "clip_score": "rewards.clip_score:ClipScore",
    "preference": "rewards.preference:PreferenceReward",
    "gold": "alignkit.sandbox.gold:GoldReward",
}
