"""What a run will take, before it starts: memory by item, seconds by phase, bytes on disk.

Nothing but headers of the checkpoint is read. Layers are run on the meta device (`gsq.trace`), which gives the work
of a forward and a backward pass and what they hold; what the method adds (Hessians, GPTQ, polish, relaxation) is
counted from shapes, in the order in which `gsq.quantize` does it. Layers of one shape are counted once.

`shapes` and `windows` say what there is to do. From them `memory` lists what is held at each point of a run, which
`places` puts where there is room, and `seconds`, with `init`, `refine` and `search`, adds up what all of it takes at
the `pace` of a machine. `report` is what people ask; `fit` refuses a run that a machine cannot hold.
"""
