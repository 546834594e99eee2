"""FP8 (e4m3) for a GPU's matrix products: which layers take it is measured, on real prompts and steps.

`layers` is a layer in FP8, `sites` finds those of a program that could be, `sensitivity` measures what each costs and chooses
those that stay in bfloat16, `record` is the file in which the choice is kept, `apply` puts it into a program.
"""
