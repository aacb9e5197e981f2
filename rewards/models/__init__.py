"""Networks and preprocessing that several rewards share: CLIP, BLIP, vision-language models, detectors."""
