"""Teachers in processes of their own, run one after another, handing their outputs over shared memory."""
