"""`python -m dq`: the same as the `dq` command."""

from dq.cli import main

if __name__ == "__main__":
    main()
