"""What every part of training knows about labels: the data that write them, the tokenizers of chats, and the loss."""

from __future__ import annotations

IGNORE_INDEX = -100  # the label of a token that is not learned, as in torch's cross_entropy
