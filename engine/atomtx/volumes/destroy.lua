-- Destroy, or keep, the snapshots that are proven ours: in one transaction group, so that nothing
-- can come between the proof and the effect.
-- Arguments: "destroy" or "keep", the run id, then for each snapshot its name, "g" .. guid and
-- "t" .. createtxg (signed numbers: an argument that begins with "-" would be an option).
args = ...
argv = args["argv"]

function judge(name, run, guid, txg)
  if not zfs.exists(name) then
    return "absent"
  end
  if "g" .. tostring(zfs.get_prop(name, "guid")) ~= guid then
    return "foreign"
  end
  if "t" .. tostring(zfs.get_prop(name, "createtxg")) ~= txg then
    return "foreign"
  end
  value, source = zfs.get_prop(name, "atomtx:run")
  if value ~= run or source ~= name then
    return "unmarked"
  end
  return "ours"
end

function keep(name, run)
  err = zfs.sync.set_prop(name, "atomtx:kept", run)
  if err ~= 0 then
    return err
  end
  return zfs.sync.inherit(name, "atomtx:run")
end

results = {}
for i = 3, #argv, 3 do
  name = argv[i]
  verdict = judge(name, argv[2], argv[i + 1], argv[i + 2])
  if verdict == "ours" then
    if argv[1] == "keep" then
      err = keep(name, argv[2])
    else
      err = zfs.sync.destroy(name)
    end
    if err == 0 then
      verdict = "done"
    else
      verdict = "error " .. tostring(err)
    end
  end
  results[#results + 1] = verdict
end
return results
