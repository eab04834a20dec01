"""The optimizers of a recipe: AdamW, or Muon for the blocks' matrices with AdamW for everything
else.
"""

import torch
from torch import nn

from distill.config import Optimizer
from worldmodel.errors import UserError


class JointOptimizer:
    """Several optimizers with the interface of one, as far as the training loop and the run folder
    use it.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self._parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self._parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict:
        """As an optimizer's own; parameters are numbered through all parts."""
        state = {}
        count = 0
        for part in self._parts:
            state |= {count + index: values for index, values in part.state_dict()["state"].items()}
            count += sum(len(group["params"]) for group in part.param_groups)
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, saved: dict) -> None:
        """Load `saved["state"]`; the groups stay as they are."""
        count = 0
        for part in self._parts:
            size = sum(len(group["params"]) for group in part.param_groups)
            state = {
                index - count: values
                for index, values in saved["state"].items()
                if count <= index < count + size
            }
            part.load_state_dict(
                {"state": state, "param_groups": part.state_dict()["param_groups"]}
            )
            count += size


def make_optimizer(
    module: nn.Module, lr: float, kind: str, options: Optimizer
) -> torch.optim.Optimizer | JointOptimizer:
    """An optimizer of the trainable parameters; `kind` is adamw or muon.

    Matrices have weight decay, vectors and modulation tables have none. `muon` (Jordan et al. 2024;
    torch 2.9 or newer) orthogonalises the update of every matrix inside the blocks, scaled so that
    AdamW's learning rates fit. From random weights it learns faster per step; the references use
    AdamW to fine-tune large models. Raises UserError where torch has no Muon.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or name.endswith("scale_shift_table")]
    separate = {id(p) for p in plain}
    matrices = [(name, p) for name, p in named if id(p) not in separate]
    inside = (
        [p for name, p in matrices if name.startswith("blocks.") and p.ndim == 2]
        if kind == "muon"
        else []
    )
    separate |= {id(p) for p in inside}
    groups = [
        {
            "params": [p for _, p in matrices if id(p) not in separate],
            "weight_decay": options.weight_decay,
        },
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=options.betas, eps=options.eps, fused=True)
    if not inside:
        return adamw
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"the optimizer muon needs torch 2.9 or newer, got {torch.__version__}: update torch "
            "or use adamw"
        )
    muon = torch.optim.Muon(
        inside, lr=lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return JointOptimizer([muon, adamw])
