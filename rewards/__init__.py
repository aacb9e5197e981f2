"""Rewards, one file each, and judges. `REWARDS` and `JUDGES` map a name to its builder.

A user's own has the name `package.module:attribute`. A builder takes options (a model folder, a device) and returns an
object with the attributes and the call of `alignkit.protocols.Reward`, or with `compare` of `alignkit.protocols.Judge`.
`gold` is part of the sandbox. Labellers of pairs of clips are in `rewards.labellers`.
"""

JUDGES = {
    "reward": "rewards.serving.judge:RewardJudge",
    "served": "rewards.serving.judge:ServedJudge",
    "vlm": "rewards.vlm_judge:VlmJudge",
}

REWARDS = {
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "clip_flant5": "rewards.clip_flant5:ClipFlanT5",
    "clip_score": "rewards.clip_score:ClipScore",
    "composite": "rewards.composite:Composite",
    "explanation": "rewards.explanation:Explanation",
    "flicker": "rewards.motion:Flicker",
    "geneval": "rewards.geneval:GenEval",
    "gold": "alignkit.sandbox.gold:GoldReward",
    "high_frequency": "rewards.pixel_statistics:HighFrequency",
    "hps": "rewards.hps:Hps",
    "hpsv3": "rewards.hpsv3:HPSv3",
    "image_reward": "rewards.image_reward:ImageReward",
    "jpeg_size": "rewards.pixel_statistics:JpegSize",
    "motion": "rewards.motion:Motion",
    "mps": "rewards.mps:Mps",
    "pick_score": "rewards.pick_score:PickScore",
    "preference": "rewards.preference:PreferenceReward",
    "saturation": "rewards.pixel_statistics:Saturation",
    "served_yes_no": "rewards.served_yes_no:ServedYesNo",
    "sharpness": "rewards.pixel_statistics:Sharpness",
    "text_rendering": "rewards.text_rendering:TextRendering",
    "unified_reward": "rewards.unified_reward:UnifiedReward",
    "video_reward": "rewards.video_reward:VideoReward",
    "vqa_score": "rewards.vqa_score:VqaScore",
    "yes_no": "rewards.yes_no:YesNo",
}
