"""Meta-World's fifty tasks (MT50) as a policy meets them: the words, the picture, the state, success.

Demonstrations and rollouts both go through this file, so that both are drawn alike: a policy that learned
from pictures without shadows sees something new in pictures with them. Two ways of drawing:

    published   480 x 480 with shadows, reflections and smoothing, as in the figures of others. 265 ms of CPU
                time a picture where no GPU draws
    fast        twice the wanted size, no shadows, no reflections, no smoothing: at 96 x 96, 14 ms a recorded
                step, with the simulation and the PNG file

Either is then reduced to `size`. The protocol is that of LeRobot's Meta-World (envs/metaworld.py): the camera
corner2 moved to (0.75, 0.075, 0.7), which version 3.1.1 calls corner4; both axes flipped; the state is the
first four numbers of what the simulator tells (the gripper's x, y, z, and how far it is open); a task is done
if it was done at any step of 500. Only the starts differ: there they come from numpy's global generator,
because this version ignores the seed of `reset`; here the start of a seed is the same in each process.

    pip install metaworld==3.1.1 mujoco==3.3.0
"""
import importlib.metadata
import os
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")       # to draw without a screen; read by mujoco's import
import mujoco  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from metaworld.policies import ENV_POLICY_MAP  # noqa: E402

from config import UserError  # noqa: E402

# The groups of Seo et al. (arXiv 2206.14244, appendix), by which VLAs report. The words are our own: a policy
# that was trained on other demonstrations needs the words of those (--instructions of the rollouts).
GROUPS = {
    "easy": {
        "button-press-v3": "press the button",
        "button-press-topdown-v3": "press the button from above",
        "button-press-topdown-wall-v3": "reach over the wall and press the button from above",
        "button-press-wall-v3": "reach around the wall and press the button",
        "coffee-button-v3": "press the button of the coffee machine",
        "dial-turn-v3": "turn the dial",
        "door-close-v3": "close the door",
        "door-lock-v3": "lock the door",
        "door-open-v3": "open the door",
        "door-unlock-v3": "unlock the door",
        "drawer-close-v3": "push the drawer closed",
        "drawer-open-v3": "pull the drawer open",
        "faucet-close-v3": "close the faucet",
        "faucet-open-v3": "open the faucet",
        "handle-press-v3": "press the handle down",
        "handle-press-side-v3": "press the handle at the side down",
        "handle-pull-v3": "pull the handle up",
        "handle-pull-side-v3": "pull the handle at the side up",
        "lever-pull-v3": "pull the lever up",
        "plate-slide-v3": "slide the plate into the goal",
        "plate-slide-back-v3": "slide the plate back out of the goal",
        "plate-slide-back-side-v3": "slide the plate out of the goal to the side",
        "plate-slide-side-v3": "slide the plate into the goal from the side",
        "reach-v3": "move the gripper to the goal",
        "reach-wall-v3": "move the gripper around the wall to the goal",
        "window-close-v3": "close the window",
        "window-open-v3": "open the window",
        "peg-unplug-side-v3": "pull the peg out of the hole",
    },
    "medium": {
        "basketball-v3": "put the ball into the basket",
        "bin-picking-v3": "move the cube into the other bin",
        "box-close-v3": "put the lid on the box",
        "coffee-pull-v3": "pull the mug away from the coffee machine",
        "coffee-push-v3": "push the mug under the coffee machine",
        "hammer-v3": "drive the nail in with the hammer",
        "peg-insert-side-v3": "put the peg into the hole in the side",
        "push-wall-v3": "push the puck around the wall to the goal",
        "soccer-v3": "push the ball into the goal",
        "sweep-v3": "sweep the cube off the table",
        "sweep-into-v3": "sweep the cube into the hole",
    },
    "hard": {
        "assembly-v3": "put the ring over the peg",
        "hand-insert-v3": "put the cube into the hole",
        "pick-out-of-hole-v3": "lift the puck out of the hole",
        "pick-place-v3": "lift the puck to the goal",
        "push-v3": "push the puck to the goal",
        "push-back-v3": "push the puck back to the goal",
    },
    "very_hard": {
        "shelf-place-v3": "put the cube on the shelf",
        "disassemble-v3": "take the ring off the peg",
        "stick-pull-v3": "pull the mug with the stick",
        "stick-push-v3": "push the mug with the stick",
        "pick-place-wall-v3": "lift the puck over the wall to the goal",
    },
}
INSTRUCTIONS = {task: words for tasks in GROUPS.values() for task, words in tasks.items()}
LONGEST = 500                                               # steps of a rollout; the simulator takes no more


class Drawing(NamedTuple):
    """way: "published" or "fast"; size: of the picture that comes out, each side, in pixels."""
    way: str
    size: int

    @property
    def drawn(self):
        """Pixels of each side, before the picture is reduced."""
        return 480 if self.way == "published" else 2 * self.size


def pick_tasks(asked):
    """"reach-v3,hard" -> the names of tasks, in the order of GROUPS. "all" are fifty. Raises UserError."""
    names = set()
    for name in filter(None, (part.strip() for part in asked.split(","))):
        if name == "all":
            names |= set(INSTRUCTIONS)
        elif name in GROUPS:
            names |= set(GROUPS[name])
        elif name in INSTRUCTIONS:
            names.add(name)
        else:
            raise UserError(f"--tasks {asked}: there is no {name!r}. Give all, groups ({', '.join(GROUPS)}) "
                            f"or tasks joined by commas, such as {', '.join(list(INSTRUCTIONS)[:3])}")
    if not names:
        raise UserError("--tasks is empty: give all, groups or tasks joined by commas")
    return [task for task in INSTRUCTIONS if task in names]


class World:
    """One task in the simulator, with its expert. Close it before the next one is made, or use `with`."""

    def __init__(self, task, drawing):
        self.env = ALL_V3_ENVIRONMENTS[task]()
        # What the class MT1 of the package does to an environment, without its fifty starts of a fixed list:
        # the goal is told (the expert needs it), and each start draws its places anew, from the seed.
        self.env._partially_observable, self.env._freeze_rand_vec = False, False
        self.env._set_task_called = self.env.seeded_rand_vec = True
        # The bounds were computed, and kept, while the goal was hidden: they would clip it to zero.
        vars(self.env).pop("sawyer_observation_space", None)
        self.drawing, self.expert_policy = drawing, ENV_POLICY_MAP[task]()
        published = drawing.way == "published"
        if not published:
            self.env.model.vis.quality.offsamples = 0       # read when the renderer is made
        # Not the environment's own render(): when an older one of those is collected as garbage, it takes
        # the OpenGL context away from the newer one, whose pictures are then black, without an error.
        self.renderer = mujoco.Renderer(self.env.model, drawing.drawn, drawing.drawn)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = published

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.renderer.close()
        self.env.close()

    def start(self, seed):
        """Places everything anew -> (39,) what the simulator tells: the state, objects, the goal."""
        self.env.seed(seed)                                 # reset(seed=...) of this version ignores it
        return self.env.reset()[0]

    def step(self, action):
        """(4,) in -1..1: how the gripper moves, how it closes -> (39,), and whether the task is done now."""
        action = np.clip(np.asarray(action, np.float64), -1, 1).astype(np.float32)
        known, _, _, _, about = self.env.step(action)
        return known, bool(about["success"])

    def expert(self, known):
        """(39,) -> (4,) what the scripted policy of the package does, which knows where everything is."""
        return np.clip(self.expert_policy.get_action(known), -1, 1)

    def picture(self):
        """What the camera sees now (PIL, RGB), upright."""
        self.renderer.update_scene(self.env.data, "corner4")
        pixels = np.ascontiguousarray(self.renderer.render()[::-1, ::-1])
        size = self.drawing.size
        image = Image.fromarray(pixels)
        return image if image.width == size else image.resize((size, size), Image.Resampling.BICUBIC)


def state_of(known):
    """What the robot knows of itself."""
    return [float(number) for number in known[:4]]


def version():
    """Another one may draw otherwise, or place things otherwise."""
    return f"metaworld {importlib.metadata.version('metaworld')}, mujoco {mujoco.__version__}"
