//! Commands about checkpoints by the calendar.

use super::args::ScheduleCommand;
use super::client::{Client, segment};
use super::commands::Out;
use super::render::table;
use crate::api::ScheduleRequest;
use crate::error::Result;
use crate::group::{ScheduleStatus, ScheduledTime};

pub(super) async fn schedule(client: &Client, out: &Out, command: ScheduleCommand) -> Result<()> {
    let all = |group: &str| segment(group).map(|group| format!("/v1/groups/{group}/schedules"));
    match command {
        ScheduleCommand::Add { group, calendar, app, label } => {
            let request = ScheduleRequest { calendar, application: app, label };
            let added: ScheduleStatus = client.post(&all(&group)?, &request).await?;
            out.show(&added, |added| {
                let times = added.next.iter().map(|time| format!("  {}", shown(time)));
                let times: Vec<String> = times.collect();
                format!(
                    "schedule {} of group {group}: {}; it comes next\n{}{}",
                    added.number,
                    added.normal,
                    times.join("\n"),
                    remark(added).map(|remark| format!("\n{remark}")).unwrap_or_default()
                )
            });
        }
        ScheduleCommand::List { group } => {
            let listed: Vec<ScheduleStatus> = client.get(&all(&group)?).await?;
            out.show(&listed, |listed| schedules(listed));
        }
        ScheduleCommand::Remove { group, number } => {
            let path = format!("{}/{number}", all(&group)?);
            let gone: ScheduleStatus = client.delete(&path).await?;
            out.show(&gone, |gone| {
                format!("schedule {} ({}) was removed", gone.number, gone.calendar)
            });
        }
    }
    Ok(())
}

fn shown(time: &ScheduledTime) -> String {
    format!("{}  {}", time.time, time.local)
}

/// What is to be said of one beside its times.
fn remark(schedule: &ScheduleStatus) -> Option<String> {
    let rests = schedule.rests.as_ref().map(|why| format!("rests: {why}"));
    rests.or_else(|| schedule.waiting.as_ref().map(|why| format!("one is due: {why}")))
}

fn schedules(listed: &[ScheduleStatus]) -> String {
    if listed.is_empty() {
        return "no schedules".into();
    }
    let mut rows = Vec::new();
    for schedule in listed {
        let mut times = schedule.next.iter().map(shown);
        rows.push(vec![
            schedule.number.to_string(),
            schedule.calendar.clone(),
            schedule.consistent.clone(),
            schedule.label.clone().unwrap_or_default(),
            times.next().unwrap_or_else(|| "no more".into()),
        ]);
        let more = times.chain(remark(schedule));
        rows.extend(
            more.map(|time| vec![String::new(), String::new(), String::new(), String::new(), time]),
        );
    }
    table(&["NO", "CALENDAR", "CONSISTENT", "LABEL", "NEXT (UTC, THEN ITS ZONE)"], &rows)
}
