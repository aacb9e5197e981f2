"""Trainers: `AlignTrainer` on `transformers.Trainer`, and one thin file per method."""
