"""Train a tiny model and be killed, as the machine would do it: without a chance to clean up.

python tests/training_killed_run.py OUTPUT_DIR after_step|while_saving STEP
"""

import os
import signal
import sys

from conftest import make_model
from training_run import TinyCollator, make_arguments, make_samples
from transformers import TrainerCallback

from modeling_emu.training.trainer import EmuTrainer


DROPOUT = 0.2  # so that the state of the random numbers counts


def make_killable_trainer(output_dir: str, trainer_class: type[EmuTrainer] = EmuTrainer, callbacks=None) -> EmuTrainer:
    """A trainer of six shuffled steps with AdamW that saves after each second one."""
    model = make_model()
    for module in model.model.causal_former.modules():
        if type(module).__name__ == "Dropout":
            module.p = DROPOUT
    arguments = make_arguments(
        output_dir,
        batch_size=2,
        num_train_epochs=2,
        max_steps=6,
        optim="adamw_torch",
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        train_sampling_strategy="random",
        save_strategy="steps",
        save_steps=2,
    )
    return trainer_class(
        model=model, args=arguments, train_dataset=make_samples(), data_collator=TinyCollator(), callbacks=callbacks
    )


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfterStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kill_myself()


def main(output_dir: str, when: str, step: str) -> None:
    class KilledWhileSaving(EmuTrainer):
        def _save_rng_state(self, folder: str) -> None:
            if self.state.global_step == int(step):
                kill_myself()  # model and optimiser are written, the rest is not
            super()._save_rng_state(folder)

    if when == "while_saving":
        make_killable_trainer(output_dir, KilledWhileSaving).train()
    else:
        make_killable_trainer(output_dir, callbacks=[KillAfterStep(int(step))]).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
