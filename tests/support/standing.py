"""`python -m pipelines` whose trainings stand still after a few steps: they are to be ended in the middle, however late that comes.

The processes of its steps are forked from one that has imported this module.
"""

from __future__ import annotations

from pipelines import warm
from pipelines.__main__ import main
from tests.support.training_run import standing
from xtoken_core.training.trainer import DistillationTrainer

STEPS = 7

if __name__ == "__main__":
    warm.IMPORTED.append("tests.support.standing")
    main()
else:
    DistillationTrainer.compute_loss = standing(STEPS)
