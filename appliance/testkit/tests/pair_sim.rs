//! Two nodes and a link, for several hundred seeds: see `srn_testkit::sim::pair`.

#[test]
fn two_nodes_stay_in_step() {
    srn_testkit::seeds::run(&srn_testkit::sim::pair::SIMULATION, 300);
}
