"""What the other processes of an engine wrote to the log when they failed: vLLM itself says no more of it than that they did."""

from __future__ import annotations

import os
import re
import stat

from schemas.secrets import without_secrets

_OWN_LOG = "/proc/self/fd/2"
_EXCEPTION = re.compile(r"\b(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): \S.*")


class Log:
    """What stands in the file that this process's stderr goes to from now on; nothing where it goes to no file."""

    def __init__(self) -> None:
        found = os.fstat(2)
        self._start = found.st_size if stat.S_ISREG(found.st_mode) else None

    def exceptions(self) -> list[str]:
        """Kind and message of the exceptions in it, each once."""
        if self._start is None:
            return []
        with open(_OWN_LOG, encoding="utf-8", errors="replace") as file:
            file.seek(self._start)
            found = [without_secrets(match[0].strip()) for line in file if (match := _EXCEPTION.search(line))]
        return list(dict.fromkeys(found))
