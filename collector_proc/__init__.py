"""The collector: a simulator and an acting policy that stream finished chunks into the learner's replay."""
