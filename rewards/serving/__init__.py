"""Rewards and judges that ask a served model: client, cache, messages and the judge itself."""
