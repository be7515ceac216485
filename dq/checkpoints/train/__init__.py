"""How the checkpoints were made: `python -m dq.checkpoints.train --help`."""
