"""Published returns of Dreamer V1 from pixels, for comparison with ours.

Source: the scores file of the authors' TensorFlow 2 code (danijar/dreamer, scores/dreamer.json), mean over five seeds
at 105k, 205k, 505k, 1.005M and 2.005M env frames. The authors made them with earlier hyper-parameters of that code
(issue 55 there).
"""

from __future__ import annotations

ENV_FRAMES = (100_000, 200_000, 500_000, 1_000_000, 2_000_000)
DREAMER_V1_PIXELS: dict[str, tuple[int, ...]] = {
    "acrobot_swingup": (37, 77, 337, 410, 483),
    "cartpole_balance": (472, 827, 982, 988, 974),
    "cartpole_balance_sparse": (611, 995, 998, 1000, 985),
    "cartpole_swingup": (139, 342, 678, 855, 857),
    "cartpole_swingup_sparse": (45, 383, 800, 797, 771),
    "cheetah_run": (128, 385, 630, 713, 790),
    "ball_in_cup_catch": (73, 503, 962, 967, 943),
    "finger_spin": (8, 125, 339, 515, 463),
    "finger_turn_easy": (131, 271, 474, 781, 859),
    "finger_turn_hard": (38, 64, 240, 726, 907),
    "hopper_hop": (0, 10, 120, 266, 348),
    "hopper_stand": (3, 89, 610, 907, 930),
    "pendulum_swingup": (365, 774, 789, 828, 819),
    "quadruped_run": (68, 121, 201, 388, 659),
    "quadruped_walk": (59, 75, 223, 446, 821),
    "reacher_easy": (125, 239, 430, 603, 857),
    "reacher_hard": (3, 34, 95, 169, 594),
    "walker_run": (83, 187, 463, 718, 767),
    "walker_stand": (315, 723, 960, 960, 965),
    "walker_walk": (137, 508, 886, 956, 969),
}
