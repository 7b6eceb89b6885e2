"""Delete unneeded residual blocks from timm models, after training or while you train them (ε-ResNet).

Importing the package registers ``eps_resnet*`` with timm and the ``EpsResNet`` classes with transformers.
"""

from .analysis.analyze import analyze
from .analysis.report import Analysis
from .budget import Budget
from .cost_schedule import CostEpsilon
from .criteria import Importance, LeaveOneOut, Response
from .cutting.prune import prune
from .gate import EpsilonGate
from .hf.configuration_eps_resnet import EpsResNetConfig
from .hf.distillation import Distillation
from .hf.modeling_eps_resnet import EpsResNetBackbone, EpsResNetForImageClassification, EpsResNetModel
from .hf.trainer_callback import EpsilonCallback
from .hub.export import export_timm
from .hub.onnx_export import export_onnx
from .hub.program_export import export_program
from .hub.saving import push_to_hub, save_pretrained
from .learning_rate import RestartingLR
from .models import eps_resnet as _eps_resnet  # noqa: F401  registers the timm models
from .models import eps_twins as _eps_twins  # noqa: F401
from .models.mixin import EpsilonMixin
from .page.writing import write_page
from .pruner import EpsilonPruner
from .schedule import BudgetEpsilon, ConstantEpsilon
from .surgery.branches import gates
from .surgery.parameters import param_groups
from .surgery.removal import add_gates, remove_closed, removed_slots
from .surgery.sharding import gathered

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "Budget",
    "BudgetEpsilon",
    "ConstantEpsilon",
    "CostEpsilon",
    "Distillation",
    "EpsResNetBackbone",
    "EpsResNetConfig",
    "EpsResNetForImageClassification",
    "EpsResNetModel",
    "EpsilonCallback",
    "EpsilonGate",
    "EpsilonMixin",
    "EpsilonPruner",
    "Importance",
    "LeaveOneOut",
    "Response",
    "RestartingLR",
    "add_gates",
    "analyze",
    "export_onnx",
    "export_program",
    "export_timm",
    "gates",
    "gathered",
    "param_groups",
    "prune",
    "push_to_hub",
    "remove_closed",
    "removed_slots",
    "save_pretrained",
    "write_page",
]
