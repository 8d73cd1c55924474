"""`python -m pag_retrofit` and `accelerate launch -m pag_retrofit`."""

from __future__ import annotations

from pag_retrofit.cli import main

if __name__ == "__main__":
    main()
