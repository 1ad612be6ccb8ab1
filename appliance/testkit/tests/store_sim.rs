//! The real store on the simulated disk, for several hundred seeds: see `srn_testkit::sim::store`.

#[test]
fn the_store_keeps_its_promises() {
    srn_testkit::seeds::run(&srn_testkit::sim::store::SIMULATION, 400);
}

#[test]
fn every_operation_of_a_short_schedule_may_be_the_last() {
    srn_testkit::seeds::run(&srn_testkit::sim::store::EVERY_OPERATION, 3);
}
