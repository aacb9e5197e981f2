"""Rewards and judges that use a served model: client, cache, messages, judges."""
