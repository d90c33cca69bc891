"""What the experiments share, a file each.

workload      what is trained: parameters, batches, loss, evaluation
optimizers    specifications such as `sparse_ggt:window_size=16`, and what they make
schedules     learning rates over the steps, and the grids that are searched
training      the compiled loop, over several seeds at once where that is faster
results       runs by their configuration, in a JSON file
command       the options of every command, and the loop over all of its runs
"""
