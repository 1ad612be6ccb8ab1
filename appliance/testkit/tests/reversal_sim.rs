//! Two nodes whose roles change, for many seeds: see `srn_testkit::sim::reversal`.

#[test]
fn nothing_answered_is_lost_when_the_direction_turns() {
    srn_testkit::seeds::run(&srn_testkit::sim::reversal::SIMULATION, 100);
}
