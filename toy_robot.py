"""A robot in the drawn world: the default data of stage `vla`. Nothing is downloaded.

A table seen from above, two to four colored shapes as in toy.py, and a gripper. The task is one sentence, such as "put the
red circle on the blue square". An action is (dx, dy, grip): pixels to move, at most STEP each; grip 1 = open, 0 = close.

    python toy_robot.py           # writes data/toy_robot: episodes of a scripted expert; `train.py` does it by itself

The expert's next action depends only on what the picture shows, so a policy can learn it from single pictures. While it is
recorded, noise pushes the gripper off its way and opens or closes it at the wrong time: the data shows how to recover.
"""
import argparse
import json
import random
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import toy

STEP = 8.0                                                  # pixels per action and axis, at most
REACH = 7.0                                                 # a closing gripper takes a thing that is so near [pixels]
NEAR = 4.0                                                  # the expert closes and opens from here [pixels]
ON = 8.0                                                    # "on" = centers so near [pixels]
MOST_STEPS = 40


def unseen_pair(thing, target):
    """One pair in eight never occurs in training. Decided by its name, so it is the same everywhere."""
    return zlib.crc32(f"{thing} on {target}".encode()) % 8 == 0


class Table:
    """One scene with a gripper and a task. `unseen`: tasks of the pairs left out of training, or of the others."""

    def __init__(self, rng, unseen=False):
        self.rng = rng
        while True:
            scene = toy.random_scene(rng)
            thing, target = rng.sample(range(len(scene)), 2)
            if unseen_pair(self.name(scene[thing]), self.name(scene[target])) == unseen:
                break
        self.scene, self.thing, self.target = scene, thing, target
        cell = toy.PIXELS / 3
        self.places = np.array([((t.cell % 3 + 0.5) * cell + rng.uniform(-3, 3),
                                 (t.cell // 3 + 0.5) * cell + rng.uniform(-3, 3)) for t in scene])       # (things, 2)
        self.looks = [(tuple(min(255, int(c * shade)) for c in toy.COLORS[t.color]), rng.uniform(9.5, 12.5),
                       rng.uniform(-0.25, 0.25)) for t in scene for shade in (rng.uniform(0.88, 1.05),)]
        self.gripper = np.array([rng.uniform(12, toy.PIXELS - 12) for _ in range(2)])
        self.open, self.held = True, None
        self.instruction = f"put the {self.name(scene[thing])} on the {self.name(scene[target])}"

    @staticmethod
    def name(thing):
        return f"{thing.color} {thing.shape}"

    def step(self, action):
        """(dx, dy, grip): first the gripper moves, with what it holds, then it opens or closes."""
        self.gripper = np.clip(self.gripper + np.clip(action[:2], -STEP, STEP), 6, toy.PIXELS - 6)
        if self.held is not None:
            self.places[self.held] = self.gripper
        self.open = bool(action[2] > 0.5)
        if self.open:
            self.held = None
        elif self.held is None:
            far = np.linalg.norm(self.places - self.gripper, axis=1)
            # What was put down last lies on top; the thing of the task is asked first, as it can only be on top.
            near = [i for i in (self.thing, *np.argsort(far)) if far[i] <= REACH]
            if near:
                self.held = int(near[0])
                self.places[self.held] = self.gripper

    def success(self):
        return self.held != self.thing and np.linalg.norm(self.places[self.thing] - self.places[self.target]) <= ON

    def expert(self):
        """The next action towards the goal."""
        def towards(place, at_place, on_the_way):
            way = place - self.gripper
            near = np.linalg.norm(way) <= NEAR
            return np.array([*(way * min(1.0, STEP / max(np.abs(way).max(), 1e-9))), at_place if near else on_the_way])
        if self.success():
            return np.array([0.0, 0.0, 1.0])                # done: stay, open
        if self.held == self.thing:
            return towards(self.places[self.target], 1.0, 0.0)
        if self.held is not None:
            return np.array([0.0, 0.0, 1.0])                # the wrong thing: let it go
        return towards(self.places[self.thing], 0.0, 1.0)

    def picture(self):
        fine = 3
        image = Image.new("RGB", (toy.PIXELS * fine,) * 2, (238, 238, 232))
        canvas = ImageDraw.Draw(image)
        order = [i for i in range(len(self.scene)) if i != self.thing] + [self.thing]
        for i in order:
            color, radius, angle = self.looks[i]
            x, y = self.places[i] * fine
            toy.draw_shape(canvas, self.scene[i].shape, color, x, y, radius * fine, angle)
        x, y = self.gripper * fine
        gap, dark = (14 if self.open else 8) * fine, (40, 40, 46)
        for side in (-gap, gap):                            # two fingers and what joins them
            canvas.rectangle((x + side - 2 * fine, y - 9 * fine, x + side + 2 * fine, y + 9 * fine), fill=dark)
        canvas.rectangle((x - gap, y - 12 * fine, x + gap, y - 8 * fine), fill=dark)
        return image.reduce(fine)


def record(rng, noise=2.0, slip=0.06):
    """One episode of the expert: [(picture, action), ...]. What is written down is its answer to what the picture shows;
    what happens differs by noise [pixels], and the grip slips now and then."""
    table, steps, done = Table(rng), [], 0
    if rng.random() < 0.3:                                  # begin in the middle: the thing is already held
        table.gripper = table.places[table.thing] = np.array([rng.uniform(12, toy.PIXELS - 12) for _ in range(2)])
        table.open, table.held = False, table.thing
    while len(steps) < MOST_STEPS and done < 2:
        action = table.expert()
        steps.append((table.picture(), action))
        done += table.success()
        moved = action + [rng.gauss(0, noise), rng.gauss(0, noise), 0]
        if rng.random() < slip:
            moved[2] = 1 - moved[2]
        table.step(moved)
    return table.instruction, steps


def write(folder, seed=0, episodes=800):
    folder, rng = Path(folder), random.Random(seed)
    for split, count in (("val", max(1, episodes // 20)), ("train", episodes)):      # train last: who finds it finds all
        rows = []
        for e in range(count):
            instruction, steps = record(rng)
            name = f"{split}_{e:05d}"
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            for i, (picture, _) in enumerate(steps):
                picture.save(folder / "images" / name / f"{i:03d}.png")
            rows.append({"id": name, "instruction": instruction, "steps": [
                {"image": f"{name}/{i:03d}.png", "action": [round(float(a), 3) for a in action]}
                for i, (_, action) in enumerate(steps)]})
        part = folder / f"{split}.part"
        part.write_text(json.dumps(rows))
        part.replace(folder / f"{split}.json")
        print(f"{folder / split}.json: {count} episodes, {sum(len(row['steps']) for row in rows)} steps")


def rollout(policy, count, unseen=False, seed=1000):
    """Lets `policy(pictures, instructions) -> (n, 3)` act on `count` tables at once until each is done or time is up.

    Returns a dict per table: instruction, success, pictures.
    """
    tables = [Table(random.Random(seed + i), unseen) for i in range(count)]
    films, running = [[] for _ in tables], list(range(count))
    for _ in range(MOST_STEPS):
        pictures = [tables[i].picture() for i in running]
        for i, picture in zip(running, pictures):
            films[i].append(picture)
        actions = policy(pictures, [tables[i].instruction for i in running])
        for i, action in zip(running, actions):
            tables[i].step(action)
        running = [i for i in running if not tables[i].success()]
        if not running:
            break
    for table, film in zip(tables, films):
        film.append(table.picture())
    return [{"instruction": table.instruction, "success": bool(table.success()), "pictures": film}
            for table, film in zip(tables, films)]


def film_strips(results, path, rows=8, columns=10):
    """Some successes and some failures, one per row, frames evenly spread over each."""
    good = [r for r in results if r["success"]]
    bad = [r for r in results if not r["success"]]
    shown = (good[:max(rows - len(bad), rows // 2)] + bad)[:rows]
    font, height = ImageFont.load_default(12), toy.PIXELS + 22
    sheet = Image.new("RGB", (columns * (toy.PIXELS + 4), len(shown) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for row, result in enumerate(shown):
        color = "darkgreen" if result["success"] else "firebrick"
        steps = len(result["pictures"]) - 1
        canvas.text((4, row * height + 3), f"{result['instruction']}: {'done' if result['success'] else 'not done'} after "
                    f"{steps} steps", fill=color, font=font)
        for column, i in enumerate(np.linspace(0, steps, min(columns, steps + 1)).astype(int)):
            sheet.paste(result["pictures"][i], (column * (toy.PIXELS + 4), row * height + 19))
    sheet.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", default="data/toy_robot", help="where to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other episodes (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=800, help="episodes for training (default: %(default)s)")
    write(**vars(parser.parse_args()))
