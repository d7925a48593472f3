"""One contract (base.py) and one file per simulator backend."""
