"""Against the interfaces of Kubeflow. No cluster runs here: servers of a few hundred lines stand in for it, held to the
published schemas of the real ones (schemas/), and execute what is submitted to them."""
