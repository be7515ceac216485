"""Learning what rounding has broken: rows of captured calls, a loop, losses."""
