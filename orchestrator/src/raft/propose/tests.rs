use super::*;
use crate::raft::status::Role;

fn nobody_leads() -> (watch::Sender<Leadership>, Door, mpsc::Receiver<Proposal>) {
    let (sender, leadership) = watch::channel(Leadership { leader: None, term: 3, role: Role::Follower });
    let (door, queue) = Door::new(leadership);
    (sender, door, queue)
}

fn command(actor: &str) -> pb::Command {
    let body = pb::command::Body::RevokeToken(pb::RevokeToken { id: "t".into() });
    pb::Command { actor: actor.into(), body: Some(body), ..Default::default() }
}

#[test]
fn a_stamp_replaces_the_time_and_nothing_else() {
    for before in [0, 7, i64::MAX] {
        let original = pb::Command { time_unix_ns: before, ..command("operator/x") };
        for time in [1, 1_764_164_364_123_456_789, i64::MAX] {
            let stamped = stamp(&original.encode_to_vec().into(), time);
            let expected = pb::Command { time_unix_ns: time, ..original.clone() };
            assert_eq!(pb::Command::decode(stamped).unwrap(), expected);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_leader_it_is_over_within_five_seconds() {
    let (_leadership, door, _queue) = nobody_leads();
    let started = Instant::now();
    let error = door.propose(command("x"), started + Duration::from_secs(60)).await.unwrap_err();
    assert_eq!(error, ProposeError::Unavailable { leader: None });
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn what_was_submitted_is_unknown_at_the_deadline() {
    let (_leadership, door, mut queue) = nobody_leads();
    let started = Instant::now();
    let proposing = door.propose(command("x"), started + Duration::from_secs(9));
    let submitting = async {
        let proposal = queue.recv().await.unwrap();
        assert!(proposal.claim.submit(false));
        proposal
    };
    let (result, proposal) = tokio::join!(proposing, submitting);
    assert_eq!(result, Err(ProposeError::Unknown));
    assert_eq!(started.elapsed(), Duration::from_secs(9));
    assert!(!proposal.claim.submit(true), "nobody waits for it any more");
}

#[tokio::test(start_paused = true)]
async fn what_was_taken_back_was_certainly_not_proposed() {
    let (_leadership, door, mut queue) = nobody_leads();
    let proposing = door.propose(command("x"), Instant::now() + Duration::from_secs(9));
    let submitting = async {
        let proposal = queue.recv().await.unwrap();
        assert!(proposal.claim.submit(false));
        proposal.claim.take_back();
        proposal
    };
    let (result, _proposal) = tokio::join!(proposing, submitting);
    assert_eq!(result, Err(ProposeError::Unavailable { leader: None }));
}

#[tokio::test]
async fn a_door_that_ends_says_whether_it_had_submitted() {
    for (submit, expected) in [(false, ProposeError::Stopped), (true, ProposeError::Unknown)] {
        let (_leadership, door, mut queue) = nobody_leads();
        let proposing = door.propose(command("x"), Instant::now() + Duration::from_secs(9));
        let ending = async {
            let proposal = queue.recv().await.unwrap();
            if submit {
                assert!(proposal.claim.submit(false));
            }
        };
        let (result, ()) = tokio::join!(proposing, ending);
        assert_eq!(result, Err(expected));
    }
}

#[tokio::test]
async fn more_than_the_bound_is_refused_and_room_comes_back() {
    let (_leadership, door, mut queue) = nobody_leads();
    let large = Bytes::from(vec![0; COMMAND_BYTES_MAX]);
    let deadline = Instant::now() + Duration::from_secs(9);
    let mut tickets = Vec::new();
    let refused = loop {
        match door.enter(large.clone(), false, false, deadline) {
            Ok(ticket) => tickets.push(ticket),
            Err(error) => break error,
        }
    };
    assert_eq!((refused, tickets.len()), (ProposeError::Overloaded, OUTSTANDING_KIB_MAX / 1025));
    queue.recv().await.unwrap().finish(Outcome::NotLeader(None));
    door.enter(large, false, false, deadline).unwrap();
    let too_large = Bytes::from(vec![0; COMMAND_BYTES_MAX + 1]);
    assert_eq!(door.enter(too_large, false, false, deadline).unwrap_err(), ProposeError::TooLarge);
}
