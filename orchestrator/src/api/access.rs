//! Who may call what: one table, asked once for every call on a member's port before anything of the call is read.
//! No service checks a role by itself, so none can forget to; what a service still checks is whether the caller may
//! speak for the host it names. A method that is not in the table is nobody's.

use http::Request;
use nave_proto::ids::ClusterId;
use nave_tls::{PeerIdentity, PeerInfo, Role};
use tonic::Status;

/// The kinds of callers, as sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Callers(u8);

impl Callers {
    /// People and scripts.
    pub(crate) const OPERATOR: Self = Self(1);
    /// The hub's own members.
    pub(crate) const MEMBER: Self = Self(1 << 1);
    /// A host's agent, for its own host.
    pub(crate) const AGENT: Self = Self(1 << 2);
    /// An agent whose certificate has run out.
    pub(crate) const EXPIRED_AGENT: Self = Self(1 << 3);
    /// Without a certificate.
    pub(crate) const STRANGER: Self = Self(1 << 4);

    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among these.
    pub(crate) const fn include(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// With a valid certificate of the cluster.
const KNOWN: Callers = Callers::OPERATOR.and(Callers::MEMBER).and(Callers::AGENT);
/// Whoever reached the port; the call proves itself by other means.
const ANYONE: Callers = KNOWN.and(Callers::EXPIRED_AGENT).and(Callers::STRANGER);

/// Who may call the method at this path; nothing for a path that is not known.
pub(crate) fn callers(path: &str) -> Option<Callers> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    match service {
        "nave.v1.ServiceService" => match method {
            "ApplyService"
            | "DeleteService"
            | "ScaleService"
            | "RestartService"
            | "RollbackService"
            | "PauseService"
            | "PromoteService"
            | "GetService"
            | "ListServices"
            | "ListServiceVersions"
            | "ListInstances"
            | "ListEndpoints"
            | "Watch"
            | "ReadLogs"
            | "GetServiceTraffic" => Some(Callers::OPERATOR),
            _ => None,
        },
        "nave.v1.HostService" => match method {
            "ListHosts" | "GetHost" | "DrainHost" | "UndrainHost" | "ForgetHost" => Some(Callers::OPERATOR),
            _ => None,
        },
        "nave.v1.EventService" => (method == "ListEvents").then_some(Callers::OPERATOR),
        "nave.v1.ClusterService" => match method {
            "GetClusterStatus" | "AddMember" | "RemoveMember" | "TakeSnapshot" | "CreateToken"
            | "ListTokens" | "RevokeToken" => Some(Callers::OPERATOR),
            // A follower hands this one on to the leader.
            "TransferLeader" => Some(Callers::OPERATOR.and(Callers::MEMBER)),
            _ => None,
        },
        "nave.v1.EnrollService" => match method {
            "Enroll" => Some(ANYONE),
            "Renew" => Some(Callers::AGENT.and(Callers::EXPIRED_AGENT)),
            _ => None,
        },
        "nave.v1.AgentSession" => (method == "OpenSession").then_some(Callers::AGENT),
        "nave.v1.MemberService" => match method {
            "GetMemberInfo" | "Propose" | "GetReadIndex" | "ForwardBeats" => Some(Callers::MEMBER),
            _ => None,
        },
        "nave.v1.RaftTransport" => match method {
            "StreamAppend" | "Append" | "Vote" | "PreVote" | "TransferLeader" | "InstallSnapshot" => {
                Some(Callers::MEMBER)
            }
            _ => None,
        },
        "grpc.health.v1.Health" => matches!(method, "Check" | "List" | "Watch").then_some(KNOWN),
        "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection" => {
            (method == "ServerReflectionInfo").then_some(Callers::OPERATOR)
        }
        _ => None,
    }
}

/// Lets a call pass, or says why not. `cluster` is this member's.
pub(crate) fn check<B>(request: &Request<B>, cluster: ClusterId) -> Result<(), Status> {
    let identity = request.extensions().get::<PeerInfo>().and_then(|peer| peer.identity.as_ref());
    decide(request.uri().path(), known(identity, cluster))
}

/// An identity of another cluster is nobody's here.
pub(crate) fn known(identity: Option<&PeerIdentity>, cluster: ClusterId) -> Option<&PeerIdentity> {
    identity.filter(|identity| identity.cluster == cluster)
}

/// The same for a path and an identity of this cluster.
pub(crate) fn decide(path: &str, identity: Option<&PeerIdentity>) -> Result<(), Status> {
    let caller = caller(identity);
    match callers(path) {
        Some(callers) if caller.is_some_and(|caller| callers.include(caller)) => Ok(()),
        Some(callers) => Err(refusal(path, identity, callers)),
        None if caller.is_some_and(|caller| KNOWN.include(caller)) => Err(Status::unimplemented(format!(
            "there is no {path} on this member; compare the versions with `nave cluster status`"
        ))),
        None => Err(refusal(path, identity, KNOWN)),
    }
}

/// The set of one that an identity is; nothing for an expired operator or member, who may do nothing at all.
fn caller(identity: Option<&PeerIdentity>) -> Option<Callers> {
    match identity {
        None => Some(Callers::STRANGER),
        Some(PeerIdentity { role: Role::Agent(_), expired: true, .. }) => Some(Callers::EXPIRED_AGENT),
        Some(PeerIdentity { expired: true, .. }) => None,
        Some(PeerIdentity { role: Role::Operator(_), .. }) => Some(Callers::OPERATOR),
        Some(PeerIdentity { role: Role::Member(_), .. }) => Some(Callers::MEMBER),
        Some(PeerIdentity { role: Role::Agent(_), .. }) => Some(Callers::AGENT),
    }
}

fn refusal(path: &str, identity: Option<&PeerIdentity>, callers: Callers) -> Status {
    let Some(identity) = identity else {
        return Status::unauthenticated(format!(
            "{path} needs a certificate of this cluster; use the client.toml that `nave init` or `nave dev` wrote"
        ));
    };
    if identity.expired {
        return Status::unauthenticated(format!(
            "the certificate of {} has run out; an agent renews its own, an operator needs a new one from `nave init`",
            identity.role
        ));
    }
    let who = if callers.include(Callers::OPERATOR) { "operators" } else { "the cluster's own parts" };
    Status::permission_denied(format!("{} may not call {path}, which is for {who}", identity.role))
}

/// The text that names the caller in events: `operator/NAME`, `agent/h-3`, `member/m-1`.
pub(crate) fn actor<T>(request: &tonic::Request<T>) -> String {
    nave_tls::peer(request).map_or_else(|| "stranger".to_owned(), |identity| identity.role.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nave_proto::ids::{HostId, MemberId};
    use prost::Message as _;

    use super::*;

    fn identity(role: Role, expired: bool) -> PeerIdentity {
        PeerIdentity { cluster: ClusterId(1), role, public_key_sha256: [0; 32], expired }
    }

    /// Every method of every service that a member serves, and who may call it, letter by letter:
    /// operator, member, agent, expired agent, stranger.
    const TABLE: &[(&str, &str)] = &[
        ("/nave.v1.ServiceService/ApplyService", "o"),
        ("/nave.v1.ServiceService/DeleteService", "o"),
        ("/nave.v1.ServiceService/ScaleService", "o"),
        ("/nave.v1.ServiceService/RestartService", "o"),
        ("/nave.v1.ServiceService/RollbackService", "o"),
        ("/nave.v1.ServiceService/PauseService", "o"),
        ("/nave.v1.ServiceService/PromoteService", "o"),
        ("/nave.v1.ServiceService/GetService", "o"),
        ("/nave.v1.ServiceService/ListServices", "o"),
        ("/nave.v1.ServiceService/ListServiceVersions", "o"),
        ("/nave.v1.ServiceService/ListInstances", "o"),
        ("/nave.v1.ServiceService/ListEndpoints", "o"),
        ("/nave.v1.ServiceService/Watch", "o"),
        ("/nave.v1.ServiceService/ReadLogs", "o"),
        ("/nave.v1.ServiceService/GetServiceTraffic", "o"),
        ("/nave.v1.HostService/ListHosts", "o"),
        ("/nave.v1.HostService/GetHost", "o"),
        ("/nave.v1.HostService/DrainHost", "o"),
        ("/nave.v1.HostService/UndrainHost", "o"),
        ("/nave.v1.HostService/ForgetHost", "o"),
        ("/nave.v1.EventService/ListEvents", "o"),
        ("/nave.v1.ClusterService/GetClusterStatus", "o"),
        ("/nave.v1.ClusterService/TransferLeader", "om"),
        ("/nave.v1.ClusterService/AddMember", "o"),
        ("/nave.v1.ClusterService/RemoveMember", "o"),
        ("/nave.v1.ClusterService/TakeSnapshot", "o"),
        ("/nave.v1.ClusterService/CreateToken", "o"),
        ("/nave.v1.ClusterService/ListTokens", "o"),
        ("/nave.v1.ClusterService/RevokeToken", "o"),
        ("/nave.v1.EnrollService/Enroll", "omaes"),
        ("/nave.v1.EnrollService/Renew", "ae"),
        ("/nave.v1.AgentSession/OpenSession", "a"),
        ("/nave.v1.MemberService/GetMemberInfo", "m"),
        ("/nave.v1.MemberService/Propose", "m"),
        ("/nave.v1.MemberService/GetReadIndex", "m"),
        ("/nave.v1.MemberService/ForwardBeats", "m"),
        ("/nave.v1.RaftTransport/StreamAppend", "m"),
        ("/nave.v1.RaftTransport/Append", "m"),
        ("/nave.v1.RaftTransport/Vote", "m"),
        ("/nave.v1.RaftTransport/PreVote", "m"),
        ("/nave.v1.RaftTransport/TransferLeader", "m"),
        ("/nave.v1.RaftTransport/InstallSnapshot", "m"),
        ("/grpc.health.v1.Health/Check", "oma"),
        ("/grpc.health.v1.Health/Watch", "oma"),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "o"),
        // Not served by members.
        ("/nave.v1.AgentService/ReadHostLogs", ""),
        ("/nave.v1.AgentService/GetAgentInfo", ""),
        ("/nave.v1.AgentService/GetServiceAddresses", ""),
        ("/nave.v1.AgentService/GetHostTraffic", ""),
        ("/nave.v1.AgentService/ReadSpans", ""),
        ("/nave.v1.ServiceService/Nothing", ""),
        ("/", ""),
        ("", ""),
    ];

    fn everyone() -> [(char, Option<PeerIdentity>); 7] {
        [
            ('o', Some(identity(Role::Operator("ann".to_owned()), false))),
            ('m', Some(identity(Role::Member(MemberId(1)), false))),
            ('a', Some(identity(Role::Agent(HostId(3)), false))),
            ('e', Some(identity(Role::Agent(HostId(3)), true))),
            ('s', None),
            // Without a letter in the table: may do nothing.
            ('O', Some(identity(Role::Operator("ann".to_owned()), true))),
            ('M', Some(identity(Role::Member(MemberId(1)), true))),
        ]
    }

    #[test]
    fn each_method_is_open_to_its_callers_and_to_nobody_else() {
        for (path, letters) in TABLE {
            for (letter, identity) in everyone() {
                // What proves itself by a token needs no certificate, so a bad one does not close it.
                let allowed = letters.contains(letter);
                assert_eq!(decide(path, identity.as_ref()).is_ok(), allowed, "{path} by {identity:?}");
            }
        }
    }

    #[test]
    fn the_table_names_every_method_of_the_protocol() {
        let set = prost_types::FileDescriptorSet::decode(nave_proto::FILE_DESCRIPTOR_SET).unwrap();
        let table: BTreeMap<_, _> = TABLE.iter().copied().collect();
        for file in set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(
                        table.contains_key(path.as_str()),
                        "{path} is in the protocol but not in this table"
                    );
                }
            }
        }
    }

    #[test]
    fn a_certificate_of_another_cluster_is_a_strangers() {
        let mut request = Request::builder().uri("/nave.v1.HostService/ListHosts").body(()).unwrap();
        let identity = Some(identity(Role::Operator("ann".to_owned()), false));
        request.extensions_mut().insert(PeerInfo { identity, remote: "127.0.0.1:1".parse().unwrap() });
        assert_eq!(check(&request, ClusterId(1)).map_err(|status| status.code()), Ok(()));
        let refused = check(&request, ClusterId(2)).map_err(|status| status.code());
        assert_eq!(refused, Err(tonic::Code::Unauthenticated));
    }

    #[test]
    fn a_refusal_says_who_and_what() {
        let agent = identity(Role::Agent(HostId(3)), false);
        let status = decide("/nave.v1.ServiceService/ApplyService", Some(&agent)).unwrap_err();
        assert_eq!(status.code(), tonic::Code::PermissionDenied);
        assert!(status.message().starts_with("agent/h-3 may not call"), "{}", status.message());
    }
}
