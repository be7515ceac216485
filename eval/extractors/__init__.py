"""The feature extractors that come with dq, one file each; see `dq.eval.features`."""
