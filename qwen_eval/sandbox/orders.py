"""What judge, zygote and harness tell each other in a byte. Runs inside the sandbox too: it imports nothing."""

from __future__ import annotations

RUN = b"r"  # comes with a descriptor: the channel of a new candidate
END = b"e"  # kill the candidate; answered by its exit status
END_SOON = b"s"  # the same, but let it finish dying

OUT_OF_MEMORY = 3  # the exit status of a judge that met its own limit
