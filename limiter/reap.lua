-- reap: processes that are gone, and what they held. Part of sync.lua.

-- Made only by a call that finds somebody gone.
local function reaper()
  local gone = {}

  -- The jobs of a process that is gone go back to their own places, with one death more each if it died.
  function gone.return_jobs(number, died)
    for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
      local queue, parked = queue_of(flow), whole(PARKED + number)
      local ids = redis.call('ZRANGEBYSCORE', queue, parked, parked)
      for _, id in ipairs(ids) do
        local job = read_job(redis.call('HGET', JOBS, id))
        if job then
          job.deaths = job.deaths + died
          redis.call('HSET', JOBS, id, write_job(job))
        end
        redis.call('ZADD', queue, whole(job and job.place or state.place), id)
        redis.call('DEL', 'arq:in-progress:' .. id)
        returned_flows[flow] = true
      end
    end
  end

  -- It holds nothing and waits for nothing any more; its claims stay where they are.
  function gone.strike_out(process, its)
    if its then
      state.in_use = math.max(0, state.in_use - its.held)
      state.active = math.max(0, state.active - is_active(its))
      state.callers = math.max(0, state.callers - calls(its.kind))
      if state.kept_for == its.number then state.kept_for = 0 end
    end
    if redis.call('ZREM', TICKETS, process) == 1 then state.waiting = state.waiting - 1 end
    for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do redis.call('ZREM', idle_of(flow), process) end
    redis.call('ZREM', LEASES, process)
    redis.call('HDEL', GATE, 'p:' .. process, 'a:' .. process)
  end

  local function bury(process)
    local dead = read_record(redis.call('HGET', GATE, 'p:' .. process))
    if not dead then
      local healing = healer()
      healing.count_anew(state)
      for _, flow in ipairs(healing.free_orphans(state)) do returned_flows[flow] = true end
    elseif dead.seq == 0 then -- nobody died under what was left behind
      gone.return_jobs(dead.number, 0)
    else
      event(now, 'reaped', 'its lease ended', exact(dead.held), '0', process)
      gone.return_jobs(dead.number, 1)
    end
    gone.strike_out(process, dead)
  end

  function gone.bury_all()
    local rows = redis.call('ZRANGE', LEASES, 0, 63, 'WITHSCORES')
    state.reap_at = now + state.lease
    for i = 1, #rows, 2 do
      local ends = tonumber(rows[i + 1])
      if ends >= now then
        state.reap_at = math.min(state.reap_at, ends)
        return
      elseif rows[i] ~= me then
        bury(rows[i])
      end
    end
    if #rows == 128 then state.reap_at = now end
  end

  -- A call that is not the one after its last: the gate was set back to an older state, as by a failover, and does not
  -- know what the process began and ended since. It counts as unknown, so it says again what it runs. What else
  -- stands as claimed by it is left behind, under a record that nobody renews.
  function gone.leave_behind()
    event(now, 'behind', 'the gate was set back', whole(call.seq - 1), whole(record.seq), me)
    gone.strike_out(me, record)
    local rest = me .. '~' .. whole(record.number)
    record.held, record.seq, record.kind, record.idle, record.pushed = 0, 0, '-', false, ''
    record.ends = now + state.lease
    redis.call('HSET', GATE, 'p:' .. rest, write_record(record))
    redis.call('ZADD', LEASES, whole(record.ends), rest)
    record, state.reap_at = nil, 0
    state.attempt = math.max(state.attempt, now) -- numbers that were given since are not given again
  end

  return gone
end

-- Whoever calls reaps the dead: slots and claims together, never one without the other.
local function reap()
  if now > state.reap_at then reaper().bury_all() end
end
