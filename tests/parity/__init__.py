"""Is the gradient of a global batch the same however the batch is cut?

``python -m tests.parity --loss sequence_wise --layout "pp=2,dp_shard=2,ac=full"``
"""
