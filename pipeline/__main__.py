"""`python -m pipeline`: the same as `congrad`, where no other package of this name is nearer."""

from __future__ import annotations

from congrad import main

if __name__ == "__main__":
    main()
