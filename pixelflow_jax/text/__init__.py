"""Text for the model: tokenizer, frozen T5 encoder, and a cache of its states.

Captions of a dataset (see data/) and prompts of a request (see requests/) do not belong here.
"""
