"""Trainers: each is (our mixin, TRL's trainer) and wires mechanisms and objectives together."""
