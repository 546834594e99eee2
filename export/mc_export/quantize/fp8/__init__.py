"""FP8 (e4m3) and 4-bit weights for a GPU's matrix products: which layers take it is measured, on real prompts and steps.

`layers` is a layer in FP8, `int4` one with 4-bit weights, `sites` finds those of a program that could be, `sensitivity`
measures what each costs and chooses those that stay in bfloat16, `record` is the file in which the choice is kept, `apply` puts
it into a program.
"""
