"""The verbs `reward ls`, `reward score` and `reward serve`, and the rewards that training uses."""
