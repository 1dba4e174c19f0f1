"""The formulas of the auxiliary losses, for plain tensors."""

from titan_moe_lb.balancing.losses.functional import (
    add_tokens_ as add_tokens_,
)
from titan_moe_lb.balancing.losses.functional import (
    at_least_float32 as at_least_float32,
)
from titan_moe_lb.balancing.losses.functional import (
    batch_wise_load_balance as batch_wise_load_balance,
)
from titan_moe_lb.balancing.losses.functional import (
    count_tokens_per_expert as count_tokens_per_expert,
)
from titan_moe_lb.balancing.losses.functional import (
    expert_load as expert_load,
)
from titan_moe_lb.balancing.losses.functional import (
    inverse_sums as inverse_sums,
)
from titan_moe_lb.balancing.losses.functional import (
    load_balance_from_counts as load_balance_from_counts,
)
from titan_moe_lb.balancing.losses.functional import (
    load_balance_score_grad as load_balance_score_grad,
)
from titan_moe_lb.balancing.losses.functional import (
    probability_sums as probability_sums,
)
from titan_moe_lb.balancing.losses.functional import (
    router_z_loss as router_z_loss,
)
from titan_moe_lb.balancing.losses.functional import (
    sequence_wise_load_balance as sequence_wise_load_balance,
)
