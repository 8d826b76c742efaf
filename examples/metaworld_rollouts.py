"""Closed loop in Meta-World: how often a policy does its task in the simulator of its demonstrations.

    pip install metaworld==3.1.1 mujoco==3.3.0
    export MUJOCO_GL=egl                    # or osmesa: to draw without a screen
    python examples/metaworld_rollouts.py --ckpt runs/metaworld --rollouts 20

The policy sees what the demonstrations show: the camera "corner4", turned upright, 96 x 96. Starts differ by
their seed. The scripted expert, which knows where everything is, does the same tasks for comparison.
"""
import argparse
import sys
from pathlib import Path

import gymnasium
import metaworld  # noqa: F401  (registers the environments)
import numpy as np
from metaworld.policies import ENV_POLICY_MAP
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ranks  # noqa: E402
from generate import Assistant  # noqa: E402

TASKS = {"press the button from above": "button-press-topdown-v3",
         "push the drawer closed": "drawer-close-v3",
         "move the gripper to the goal": "reach-v3"}


def rollout(env, seed, steps, act):
    """Whether the task was done at any moment. act(picture, what the simulator knows) -> action."""
    known, _ = env.reset(seed=seed)
    for _ in range(steps):
        picture = Image.fromarray(np.rot90(env.render(), 2))
        known, _, _, _, info = env.step(np.clip(act(picture, known), -1, 1).astype(np.float32))
        if info["success"]:
            return True
    return False


def main(ckpt, rollouts, steps):
    assistant = Assistant(ckpt)
    for instruction, name in TASKS.items():
        expert = ENV_POLICY_MAP[name]()
        policies = {"policy": lambda picture, known: assistant.act([[picture]], [instruction])[0, 0],
                    "expert": lambda picture, known: expert.get_action(known)}
        for who, act in policies.items():
            done = 0
            # An environment of its own for each seed: it fixes the goal.
            for seed in range(1000, 1000 + rollouts):
                env = gymnasium.make("Meta-World/MT1", env_name=name, seed=seed, render_mode="rgb_array",
                                     camera_name="corner4", width=96, height=96)
                done += rollout(env, seed, steps, act)
                env.close()
            print(f"{instruction:<30} {who:<8} {done} of {rollouts}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", required=True, help="run folder of stage vla")
    parser.add_argument("--rollouts", type=int, default=20, help="of each task (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="longest rollout (%(default)s)")
    args = parser.parse_args()
    ranks.run(main, args.ckpt, args.rollouts, args.steps)
