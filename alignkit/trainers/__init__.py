"""Trainers: `AlignTrainer` on `transformers.Trainer`, and one thin file per method."""

TRAINERS = {
    "rankdpo": ("alignkit.trainers.rankdpo:RankDPOTrainer", "alignkit.trainers.rankdpo:RankDPOConfig"),
    "sft": ("alignkit.trainers.sft:SFTTrainer", "alignkit.trainers.sft:SFTConfig"),
}
