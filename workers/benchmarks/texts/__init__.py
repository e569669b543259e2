"""Texts of an exact length in tokens: tokenizers, haystacks, chat templates, keyed draws."""
