//! A replica that is too far behind for frames: see `srn_testkit::sim::leap`.

#[test]
fn what_changed_is_carried_over_whole_or_not_at_all() {
    srn_testkit::seeds::run(&srn_testkit::sim::leap::SIMULATION, 300);
}
