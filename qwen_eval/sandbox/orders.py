"""What the judge tells the zygote, a byte each. Runs inside the sandbox too: it imports nothing."""

from __future__ import annotations

RUN = b"r"  # comes with a descriptor: the channel of a new candidate
END = b"e"  # kill the candidate; answered by its exit status
END_SOON = b"s"  # the same, but let it finish dying
