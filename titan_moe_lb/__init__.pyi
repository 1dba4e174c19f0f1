from . import functional as functional
from .balancing.expert_bias import (
    ExpertBias as ExpertBias,
)
from .balancing.expert_bias import (
    FrozenBias as FrozenBias,
)
from .balancing.expert_bias import (
    MomentumBias as MomentumBias,
)
from .balancing.expert_bias import (
    ProportionalBias as ProportionalBias,
)
from .balancing.expert_bias import (
    QuantileBias as QuantileBias,
)
from .balancing.expert_bias import (
    QuantileTrendBias as QuantileTrendBias,
)
from .balancing.expert_bias import (
    SignBias as SignBias,
)
from .balancing.forced_routing import (
    BiasedNormal as BiasedNormal,
)
from .balancing.forced_routing import (
    Burst as Burst,
)
from .balancing.forced_routing import (
    ForcedRouting as ForcedRouting,
)
from .balancing.forced_routing import (
    HotExperts as HotExperts,
)
from .balancing.forced_routing import (
    HotRank as HotRank,
)
from .balancing.forced_routing import (
    HotShare as HotShare,
)
from .balancing.forced_routing import (
    Ragged as Ragged,
)
from .balancing.forced_routing import (
    RandomBalanced as RandomBalanced,
)
from .balancing.forced_routing import (
    RandomRouting as RandomRouting,
)
from .balancing.forced_routing import (
    Replay as Replay,
)
from .balancing.forced_routing import (
    Rotating as Rotating,
)
from .balancing.forced_routing import (
    RoundRobin as RoundRobin,
)
from .balancing.forced_routing import (
    TokenIndexRouting as TokenIndexRouting,
)
from .balancing.forced_routing import (
    ZeroLoad as ZeroLoad,
)
from .balancing.freezing import (
    Freeze as Freeze,
)
from .balancing.losses import (
    AuxLoss as AuxLoss,
)
from .balancing.losses import (
    BatchWiseAuxLoss as BatchWiseAuxLoss,
)
from .balancing.losses import (
    CommunicationLoss as CommunicationLoss,
)
from .balancing.losses import (
    DeviceLevelLoss as DeviceLevelLoss,
)
from .balancing.losses import (
    EntropyLoss as EntropyLoss,
)
from .balancing.losses import (
    GlobalBatchAuxLoss as GlobalBatchAuxLoss,
)
from .balancing.losses import (
    ImportanceLoss as ImportanceLoss,
)
from .balancing.losses import (
    LogitsLoss as LogitsLoss,
)
from .balancing.losses import (
    RouterZLoss as RouterZLoss,
)
from .balancing.losses import (
    SequenceWiseAuxLoss as SequenceWiseAuxLoss,
)
from .balancing.losses import (
    SumsLoss as SumsLoss,
)
from .balancing.value_schedule import (
    Change as Change,
)
from .errors import (
    JobError as JobError,
)
from .own_loop.attach import (
    attach as attach,
)
from .own_loop.balance import (
    Balance as Balance,
)
from .own_loop.build import (
    BuiltModel as BuiltModel,
)
from .own_loop.build import (
    build_model as build_model,
)
from .own_loop.observe import (
    Observation as Observation,
)
from .own_loop.observe import (
    observe as observe,
)
from .own_loop.routing_replay import (
    RoutingReplay as RoutingReplay,
)
from .own_loop.trainer_callback import (
    ExpertLoadCallback as ExpertLoadCallback,
)
from .own_loop.transformers_backend import (
    balanced_transformers as balanced_transformers,
)
from .run.train import (
    trainer_config as trainer_config,
)
from .telemetry.metrics import (
    Metric as Metric,
)
from .telemetry.metrics import (
    Reduction as Reduction,
)
from .telemetry.metrics_processor import (
    LoadBalanceMetricsProcessor as LoadBalanceMetricsProcessor,
)
from .traces.load_trace import (
    LoadTrace as LoadTrace,
)
from .traces.trace import (
    Trace as Trace,
)
from .traces.trace import (
    read_trace as read_trace,
)
from .version import __version__ as __version__
from .wiring.model_spec import (
    balanced as balanced,
)
