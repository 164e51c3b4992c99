"""Pure tensor mathematics. Imports torch and nothing else of slimlm.

Shapes stand in the types: `Annotated[Tensor, "out in"]`, a name being one number throughout a call, `...` and `*rows`
any number of axes, and `{width}` the argument; with `bool` or `int`, where entries are no floats. Tests check them.
"""
