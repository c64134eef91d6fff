"""Conventions about labels shared by data tools, chat formats and the loss."""

from __future__ import annotations

IGNORE_INDEX = -100  # the label of a token that is not learned, as in torch's cross_entropy
