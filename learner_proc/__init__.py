"""The learner: owner of the replay and of everything that must survive; one Python thread."""
